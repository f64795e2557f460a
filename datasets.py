"""Data loading: `tasks/loading.py` makes batches of any task's samples; each task's folder says where they come from.

Nothing in the project imports this file: `import datasets` is Hugging Face's package to other libraries.
"""

from tasks.loading import Data, Transformed, build_data

__all__ = ["Data", "Transformed", "build_data"]
