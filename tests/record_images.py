"""main.py, noting every training image it reads: python tests/record_images.py FILE [main.py's arguments].

Each line of FILE is "epoch position index", as the processes read them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from runtime.errors import exit_on_error
from runtime.samplers import Key
from tasks import loading
from tasks.options import parse_args


class Recorded(loading.Transformed):
    file = sys.argv[1]

    def __getitem__(self, key: Key) -> tuple:
        if len(self.source) == 48:  # the training images of the test, not its 20 evaluation images
            with open(self.file, "a") as file:
                file.write(f"{key.epoch} {key.position} {key.index}\n")
        return super().__getitem__(key)


if __name__ == "__main__":
    loading.Transformed = Recorded
    exit_on_error("main.py", lambda: main.run(parse_args(sys.argv[2:])))
