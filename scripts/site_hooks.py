"""What mkdocs does not do by itself: README, CONTRIBUTING and CHANGELOG as pages, links out of docs/.

Files that are no page (recipes, findings, notebooks) have no address on the site: their links become their names.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([\w./-]+)(#[\w-]+)?\)")


def on_config(config: Any) -> Any:
    """Leaves out of the menu what is not there, and adds what it forgot."""
    there = {*OUTSIDE, *(path.name for path in (ROOT / "docs").glob("*.md"))}
    config.nav = [
        {title: [page for page in pages if page in there] for title, pages in entry.items()}
        if isinstance(entry, dict)
        else entry
        for entry in config.nav
    ]
    listed = {"index.md"}.union(
        *(pages for entry in config.nav if isinstance(entry, dict) for pages in entry.values())
    )
    if more := sorted(there - listed):
        config.nav.append({"More": more})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that lie outside docs/."""
    for page, source in OUTSIDE.items():
        files.append(
            File.generated(config, page, content=moved((ROOT / source).read_text(), ROOT, ROOT / "docs"))
        )
    for picture in sorted(ROOT.glob("results/**/*.png")):
        files.append(File.generated(config, str(picture.relative_to(ROOT)), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Pages of docs/: links to files outside of it."""
    if page.file.src_path in OUTSIDE:
        return markdown
    here = (ROOT / "docs" / page.file.src_path).parent
    return moved(markdown, here, here)


def moved(text: str, here: pathlib.Path, there: pathlib.Path) -> str:
    """The links of a text that lay in `here`, for a page in `there`."""
    names = {ROOT / source: ROOT / "docs" / page for page, source in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        mark, words, path, anchor = match.groups()
        target = (here / path).resolve()
        target = names.get(target, target)
        if target.is_relative_to(ROOT / "docs") or (mark and target.is_relative_to(ROOT / "results")):
            inside = (
                target if target.is_relative_to(ROOT / "docs") else ROOT / "docs" / target.relative_to(ROOT)
            )
            return f"{mark}[{words}]({os.path.relpath(inside, there)}{anchor or ''})"
        return words

    return LINK.sub(link, text)
