"""Every command that the README shows exists and takes the flags it is given."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from interp.hypothesis import read_hypothesis
from superclip.compare import GridConfig
from superclip.cost import CostConfig
from superclip.errors import UserError
from superclip.evaluation.config import EvalConfig
from superclip.flags import parse, parse_train
from superclip.scaling_law import LawConfig

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
LINES = [line.split("  #")[0].strip() for line in BLOCKS.splitlines() if line.strip()]
MODULES = [line for line in LINES if line.startswith("python -m ")]


def test_the_readme_shows_commands():
    assert len(MODULES) >= 8


@pytest.mark.parametrize("line", MODULES)
def test_flags_of_shown_commands_are_understood(line, tmp_path, monkeypatch):
    _, _, module, *words = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    for named in (Path(word) for word in words if word.endswith(".pt")):
        named.parent.mkdir(exist_ok=True)
        named.touch()  # a checkpoint that is missing is refused before anything else
    if module == "superclip.train":
        parse_train(words)
    elif module == "superclip.compare":
        parse(GridConfig, words[: words.index("--")], module, "")
    elif module == "superclip.scaling_law":
        parse(LawConfig, words[: words.index("--")], module, "")
    elif module == "interp.hypothesis":
        assert read_hypothesis(ROOT / words[0]).rule and words[1] == "--ckpt"
    elif module == "superclip.evaluate":
        parse(EvalConfig, words, module, "")
    elif module == "superclip.cost":
        parse(CostConfig, words, module, "")
    elif module == "superclip.pack":
        importlib.import_module(module)._parse(words)
    else:
        command = importlib.import_module(module)
        config = next(v for k, v in vars(command).items() if k.endswith("Config"))
        parse(config, words, module, "")


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(UserError):
        parse_train(["--no-such-flag"])


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:scripts|notebooks)/[\w.]+", README))))
def test_files_named_in_the_readme_exist(name):
    path = ROOT / name
    assert path.exists() or path.is_dir(), name
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    elif path.suffix == ".py":
        done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
