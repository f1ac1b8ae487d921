"""Nothing that we read can become code: checked on the source, call by call."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = ("precompute", "train", "shared", "scripts", "benchmarks")
PICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
NEVER_REACHED = {
    "torch.load": "reads pickles; weights are safetensors",
    "torch.save": "writes pickles",
    "yaml.load": "makes objects; plain_documents.parse_yaml",
    "yaml.load_all": "makes objects",
    "yaml.full_load": "makes objects",
    "yaml.unsafe_load": "makes objects",
    "yaml.safe_load": "knows no bounds; plain_documents.parse_yaml",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "tempfile.mktemp": "a race",
    "np.load": "may hold objects",
    "numpy.load": "may hold objects",
    "pd.read_pickle": "a pickle",
}
FALSE_ALONE = {"trust_remote_code", "shell", "allow_pickle"}
"""Keywords that are given as False or not at all."""
UNPACKING = {"extractall", "extract"}
"""Of tars and zips: members are read, never written out under their own names."""


def findings(source: str) -> list[str]:
    """What is wrong with a program, line by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import() | ast.ImportFrom():
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                wrong = [f"imports {name}" for name in names if name.split(".")[0] in PICKLERS]
            case ast.keyword(arg=str(name), value=value) if name in FALSE_ALONE:
                is_false = isinstance(value, ast.Constant) and value.value is False
                wrong = [] if is_false else [f"{name} is not False"]
            case ast.Constant(value=str(name)) if name in FALSE_ALONE:
                wrong = [f"{name!r} as a text, to be set where nobody sees it"]
            case ast.Call(func=ast.Name(id=name)) if name in NEVER_CALLED:
                wrong = [f"calls {name}"]
            case ast.Attribute() if ast.unparse(node) in NEVER_REACHED:
                wrong = [f"{ast.unparse(node)}: {NEVER_REACHED[ast.unparse(node)]}"]
            case ast.Call(func=ast.Attribute(attr=name)) if name in UNPACKING:
                wrong = [f"unpacks with {name}"]
            case _:
                wrong = []
        found += [f"{getattr(node, 'lineno', '?')}: {one}" for one in wrong]
    return found


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((REPOSITORY / folder).rglob("*.py"))


def test_no_source_of_ours_can_run_what_it_reads() -> None:
    found = [f"{path.relative_to(REPOSITORY)}:{one}" for path in sources() for one in findings(path.read_text())]
    assert found == []


def test_models_are_loaded_with_the_refusal_written_out() -> None:
    """from_pretrained of transformers' Auto classes asks on the terminal where nothing is said."""
    calls = [
        (path, node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.match(r"Auto(Model|Tokenizer|Config).*from_p", ast.unparse(node.func))
    ]
    assert calls
    silent = [(path, node.lineno) for path, node in calls if "trust_remote_code" not in {k.arg for k in node.keywords}]
    assert silent == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch; torch.load(f)",
        "load = torch.load",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "f(**{'trust_remote_code': 1})",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.safe_load(f)",
        "eval('1')",
        "exec(code)",
        "subprocess.run(x, shell=True)",
        "os.system('x')",
        "np.load(f, allow_pickle=True)",
        "tar.extractall(folder)",
    ],
)
def test_each_rule_finds_what_it_is_there_for(source: str) -> None:
    assert findings(source)


def test_what_is_harmless_is_let_through() -> None:
    assert findings("re.compile(x); model.eval(); f(trust_remote_code=False); subprocess.run([x])") == []
