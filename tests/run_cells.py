"""Runs cells (a JSON list on stdin) in one IPython shell; its last line is what they showed."""

import json
import sys

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output


class Shell(InteractiveShell):
    """`%matplotlib inline` asks for no event loop."""

    def enable_gui(self, gui=None) -> None:
        assert gui is None or gui == "inline", gui


def main() -> None:
    shell, texts, data = Shell.instance(), [], []
    shell.display_formatter.active_types = shell.display_formatter.format_types
    for source in json.load(sys.stdin):
        with capture_output() as seen:
            result = shell.run_cell(source)
        if not result.success:
            print(seen.stdout, seen.stderr)
            result.raise_error()
        texts.append(seen.stdout)
        shown = [output.data for output in seen.outputs]
        if result.result is not None:
            shown.append(shell.display_formatter.format(result.result)[0])
        data += [{k: v if isinstance(v, str) else "" for k, v in of.items()} for of in shown]
    print()
    print(json.dumps({"texts": texts, "data": data}))


if __name__ == "__main__":
    main()
