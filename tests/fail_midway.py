"""main.py, failing in the process that reads the 20th image: python tests/fail_midway.py [main.py's arguments]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from runtime.errors import exit_on_error
from runtime.samplers import Key
from tasks import loading
from tasks.options import parse_args


class Failing(loading.Transformed):
    def __getitem__(self, key: Key) -> tuple:
        if len(self.source) == 48 and key.position == 19:
            raise ZeroDivisionError("a mistake in somebody's code")
        return super().__getitem__(key)


if __name__ == "__main__":
    loading.Transformed = Failing
    exit_on_error("main.py", lambda: main.run(parse_args(sys.argv[1:])))
