"""README and docs/: what they name exists, and what they tell you to type is understood."""

import ast
import importlib
import re
import runpy
import shlex
import sys

import pytest

from command_line import Parser, flags_table
from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER_PROGRAM = re.compile(r"uv |pip |python -m ")
OF_LEROBOT = {"--rename_map", "--num_workers", "--resume"}


def blocks(page, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(page.read_text()) if kind == language]


def prose(page) -> str:
    """A page without its code blocks."""
    return FENCED.sub("", page.read_text())


def anchors(page) -> set[str]:
    """The headings of a page, spelt as in a link to them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def typed_commands() -> list[str]:
    """Every command of ours in a code block, on one line and without its comment."""
    commands = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(src|bench|examples)/\w+\.py", word)]
                if scripts:
                    commands.append(shlex.join(word for word in words[scripts[0] :] if word != "..."))
    return sorted(set(commands))


def run_script(script: str, arguments: list[str]) -> None:
    """Run a script as its command line does, in this process, which has imported LeRobot already."""
    if script.startswith("src/"):
        module = importlib.import_module(script.removeprefix("src/").removesuffix(".py"))
        module.main(arguments)
        return
    path = ROOT / script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(sys, "path", [*sys.path, str(path.parent)])  # after src/, as bench/common.py sees to
        runpy.run_path(str(path), run_name="__main__")


def help_of(script: str, words: list[str], capsys) -> str:
    """What a script answers to a command line that ends in --help; its parser reads all that comes before."""
    with pytest.raises(SystemExit) as left:
        run_script(script, [*words, "--help"])
    shown = capsys.readouterr()
    assert left.value.code == 0, shown.err
    return shown.out


@pytest.mark.parametrize("command", typed_commands())
def test_commands_are_understood(command, capsys):
    script, *words = shlex.split(command)
    if script == "src/train.py":
        Parser().given(words)
        return
    known = help_of(script, words, capsys)
    for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert re.search(rf"{flag}\b", known), f"{script} has no {flag}"


def test_flags_in_the_text_exist(capsys):
    known = Parser().format_help()
    for script in ("infer", "evaluate", "serve", "export"):
        known += help_of(f"src/{script}.py", [], capsys)
    known += help_of("src/runs.py", ["cache", "prune"], capsys)
    for script in ("train", "data", "policies", "tasks"):
        known += help_of(f"bench/{script}.py", [], capsys)
    known += help_of("examples/record.py", [], capsys)
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            if OTHER_PROGRAM.match(code):
                continue
            for flag in re.findall(r"(?<!\S)--\w[\w-]*(?![\w.-])", code):  # not --policy.path, which is LeRobot's
                assert flag in OF_LEROBOT or re.search(rf"{flag}\b", known), f"{page.name}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text()
    for path in set(re.findall(r"(?<![\w/])(?:src|configs|examples|bench|tests|docs)/[\w./]*\w", text)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_flags_page_is_generated():
    page = (ROOT / "docs" / "flags.md").read_text()
    assert page[page.index("## ") :] == flags_table(), "run: make flags"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_the_two_commands_of_the_readme():
    """Others rely on them as they are."""
    assert "./setup && .venv/bin/python src/train.py --config_path configs/quickstart.json\n" in blocks(PAGES[0], "sh")
    assert "./setup && .venv/bin/python -m pytest -n 2\n" in blocks(PAGES[0], "sh")
