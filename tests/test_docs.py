"""The pages in docs/: examples run and print what is shown, links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedavg_core
import fedavg_core.testing
import nvflare_adapter
from fedavg_core.errors import Reason
from tests.examples import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "build" not in path.parts)
NEEDS_NVFLARE = [path for path in PAGES if path == DOCS / "nvflare.md"]
PACKAGES = ("fedavg_core", "nvflare_adapter")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

every_page = pytest.mark.parametrize(
    "path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix()
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to play in, which leaves no modules behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and Path(origin).parent == tmp_path:
            del sys.modules[name]


def play(path: Path, folder: Path, *needs: str) -> None:
    for block, shown, printed in Page(path, frozenset(needs)).play(folder):
        assert printed == shown, f"{path.name}, line {block.line}"


def written(folder: Path, markdown: str) -> Path:
    path = folder / "page.md"
    path.write_text(markdown, encoding="utf-8")
    return path


class TestExamples:
    @every_page
    def test_a_page_prints_what_it_shows(self, path: Path, folder: Path) -> None:
        play(path, folder)

    @pytest.mark.nvflare
    @pytest.mark.parametrize("path", NEEDS_NVFLARE, ids=lambda path: path.name)
    def test_so_do_the_examples_that_need_nvflare(self, path: Path, folder: Path) -> None:
        play(path, folder, "nvflare")

    @pytest.mark.simulator
    @pytest.mark.xdist_group("simulator")
    @pytest.mark.parametrize("path", NEEDS_NVFLARE, ids=lambda path: path.name)
    def test_so_do_those_that_start_its_simulator(self, path: Path, folder: Path) -> None:
        play(path, folder, "nvflare", "simulator")

    @every_page
    def test_they_parse_on_every_python(self, path: Path) -> None:
        for block in Page(path).blocks:
            if block.kind == "python":
                ast.parse(block.text, feature_version=(3, 10))

    @every_page
    def test_only_the_page_about_nvflare_needs_it(self, path: Path) -> None:
        needs = {block.noted("needs") for block in Page(path).blocks} - {""}
        assert needs <= {"nvflare", "simulator"}
        assert not needs or path in NEEDS_NVFLARE

    def test_every_reason_is_shown(self) -> None:
        page = Page(DOCS / "round.md")
        shown = "".join(block.text for block in page.blocks if block.kind == "text")
        for reason in Reason:
            assert re.search(rf"^{reason} \(contributor", shown, re.MULTILINE), reason


class TestThePlayer:
    """What the player of the examples must notice."""

    @pytest.mark.parametrize(
        "markdown",
        [
            "```python\nprint(1)\n```\n",
            "```python\nprint(1)\n```\n\n```text\n2\n```\n",
            "```python\nprint(1)\n```\n\nAnd more.\n\n```python\nx = 1\n```\n\n```text\n1\n```\n",
            "```console\n$ python -c print(1)\n2\n```\n",
        ],
        ids=["nothing shown", "another output", "after another block", "of a command"],
    )
    def test_another_output_is_noticed(self, markdown: str, folder: Path) -> None:
        with pytest.raises(AssertionError, match=r"page\.md, line 2"):
            play(written(folder, markdown), folder)

    def test_a_block_that_is_neither_run_nor_excused_is_noticed(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"page\.md, line 4: neither run nor excused"):
            play(written(folder, "Text.\n\n```yaml\na: 1\n```\n"), folder)
        with pytest.raises(ValueError, match=r"page\.md, line 4: neither run nor excused"):
            play(written(folder, "1. One\n\n    ```yaml\n    a: 1\n    ```\n"), folder)

    def test_an_error_names_the_line_of_the_page(self, folder: Path) -> None:
        path = written(folder, "Text.\n\n```python\nx = 1\nx.nothing\n```\n")
        with pytest.raises(AttributeError) as error:
            play(path, folder)
        assert (error.traceback[-1].path, error.traceback[-1].lineno) == (path, 4)

    def test_another_exit_code_is_noticed(self, folder: Path) -> None:
        path = written(folder, "<!-- exit code: 1 -->\n```console\n$ python -c 1\n```\n")
        with pytest.raises(AssertionError):
            play(path, folder)

    def test_files_and_names_are_there_for_later_blocks(self, folder: Path) -> None:
        page = (
            "<!-- file: mine.py -->\n```python\nA = 1\n```\n"
            "```python\nfrom mine import A\n```\n"
            "```python\nprint(A)\n```\n\n```text\n1\n```\n"
            "```console\n$ python mine.py\n$ python -c print(2)\n2\n```\n"
            "<!-- needs: more -->\n```python\nprint(A)\n```\n\n```text\n5\n```\n"
            "<!-- not run: a reason -->\n```sh\nrm -rf /\n```\n"
        )
        play(written(folder, page), folder)


class TestLinks:
    @every_page
    def test_every_relative_link_leads_somewhere(self, path: Path) -> None:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path.name}: {link}"
            if anchor:
                assert anchor in anchors(target), f"{path.name}: {link}"

    def test_every_page_is_in_the_navigation(self) -> None:
        settings = (DOCS / "zensical.toml").read_text(encoding="utf-8")
        listed = re.findall(r'"([^"]+\.md)"', settings)
        assert sorted(listed) == [path.relative_to(DOCS).as_posix() for path in PAGES]


class TestReference:
    def test_every_public_name_is_in_it(self) -> None:
        told = modules_told_of()
        for package in (fedavg_core, fedavg_core.testing, nvflare_adapter):
            for name in package.__all__:
                module = home(package.__name__, name)
                assert module in told, f"{name}: no page in docs/api has ::: {module}"

    @pytest.mark.nvflare
    def test_every_argument_of_the_recipe_is_on_its_page(self) -> None:
        text = (DOCS / "nvflare.md").read_text(encoding="utf-8")
        table = text[text.index("| purpose |") : text.index("Wrong arguments")]
        told = re.findall(r"`(\w+)`", table)
        assert sorted(told) == sorted(
            inspect.signature(nvflare_adapter.NumpyFedAvgRecipe).parameters
        )

    def test_every_module_it_tells_of_is_there(self) -> None:
        for module in modules_told_of():
            assert find_spec(module), module

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_a_docstring_names_the_arguments_that_there_are(self, path: Path) -> None:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                told = arguments_told_of(node)
                if told:
                    assert told == arguments(node), f"{path.name}, line {node.lineno}"
            elif isinstance(node, ast.ClassDef) and arguments_told_of(node):
                for made in node.body:
                    if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                        assert arguments_told_of(node) == arguments(made), node.name


def anchors(page: Path) -> set[str]:
    """The places on a page that a link can lead to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def modules_told_of() -> set[str]:
    pages = (DOCS / "api").glob("*.md")
    return {
        module
        for page in pages
        for module in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


def home(package: str, name: str) -> str:
    """The module that a public name of a package is defined in."""
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in tree.body}
        defined |= {
            target.id
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        if name in defined:
            return ".".join(path.relative_to(ROOT).with_suffix("").parts)
    raise AssertionError(f"{package} has no {name}")


def arguments(function: ast.FunctionDef) -> list[str]:
    """The names of a function's arguments, but for its object and those that do not matter."""
    given = function.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [one.arg for one in named if one is not None]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def arguments_told_of(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """The names under Args in a docstring."""
    section = re.search(r"^Args:\n((?: {4}.*\n|\n)*)", (ast.get_docstring(node) or "") + "\n", re.M)
    if section is None:
        return []
    names = re.findall(r"^ {4}\**(\w+(?:, \w+)*):", section[1], re.MULTILINE)
    return [name for line in names for name in line.split(", ")]
