"""Check the links of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/: `python tools/links.py [--fix]`, exit 1 if one is dead.

A link to a line of code says in its text which symbol stands there:

    [`Trainer.train_step`](../megalm/train/trainer.py#L73)

and that line must define it: a class, a function or a name that is assigned. Lines move; `--fix` writes the numbers
anew. Other relative links must lead to a file, and `#heading` to a heading. Links to the web are not followed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?\)|(?:src|href)=\"(?P<html>[^\"#]+)\"")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Link:
    """One link of a page."""

    page: Path
    line: int
    text: str
    target: str
    anchor: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def find_pages(root: Path) -> list[Path]:
    """The pages whose links are checked, relative to the root."""
    pages = [root / name for name in PAGES if (root / name).is_file()] + sorted((root / "docs").rglob("*.md"))
    return [page.relative_to(root) for page in pages]


def find_links(root: Path, page: Path) -> Iterator[Link]:
    """All links of a page, also of its pictures; code blocks hold none."""
    text = (root / page).read_text(encoding="utf-8")
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for found in LINK.finditer(prose):
        target = found["html"] or found["target"] or ""
        if not re.match(r"[a-z]+:", target):
            yield Link(page, prose.count("\n", 0, found.start()) + 1, found["text"] or "", target, found["anchor"] or "")


def symbols(file: Path) -> dict[str, int]:
    """Every class, function and assigned name of a Python file, methods and fields as Class.name -> line."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            names: list[str] = []
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                found.setdefault(prefix + name, node.lineno)
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def fault_of(root: Path, link: Link) -> str:
    """What is wrong with a link; empty if nothing."""
    path = (root / link.page).parent / link.target if link.target else root / link.page
    if not path.exists():
        return f"{link.target}: no such file"
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{link.target}: outside the checkout"
    if path.suffix == ".md":
        return f"#{link.anchor}: no such heading in {path.name}" if link.anchor and link.anchor not in headings(path) else ""
    if path.suffix != ".py" or not link.anchor:
        return f"#{link.anchor}: only lines of Python files can be linked" if link.anchor else ""
    wanted = symbols(path).get(link.text.strip("`"))
    if wanted is None:
        return f"{link.target} defines no {link.text}"
    return "" if link.anchor == f"L{wanted}" else f"{link.text} is at {link.target}#L{wanted}, not #{link.anchor}"


def check_links(root: Path) -> list[str]:
    """All dead links, each with its place."""
    links = [link for page in find_pages(root) for link in find_links(root, page)]
    return [f"{link.place}: {fault}" for link in links if (fault := fault_of(root, link))]


def fix_page(root: Path, page: Path) -> int:
    """Write the line numbers of a page anew; returns how many changed. Unknown symbols stay as they are."""
    changed = 0

    def renumber(found: re.Match[str]) -> str:
        nonlocal changed
        file = (root / page).parent / (found["target"] or "")
        if file.suffix != ".py" or not file.is_file() or not (found["anchor"] or "").startswith("L"):
            return found[0]
        line = symbols(file).get(found["text"].strip("`"))
        if line is None or found["anchor"] == f"L{line}":
            return found[0]
        changed += 1
        return f"[{found['text']}]({found['target']}#L{line})"

    text = (root / page).read_text(encoding="utf-8")
    fixed = LINK.sub(renumber, text)
    if changed:
        (root / page).write_text(fixed, encoding="utf-8")
    return changed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check the links of the pages.")
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--fix", action="store_true", help="write the line numbers anew")
    options = parser.parse_args(arguments)
    pages = find_pages(options.root)
    fixed = sum(fix_page(options.root, page) for page in pages) if options.fix else 0
    dead = check_links(options.root)
    print("\n".join([*dead, f"links: {len(dead)} dead, {fixed} renumbered, {len(pages)} pages"]))
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
