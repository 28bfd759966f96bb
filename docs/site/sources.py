"""A hook of MkDocs: the documents' links to files outside docs/ lead to pages that show those files.

A document links to an example or a test as it stands in the repository (``../examples/fsdp2.py``), which is right where
the repository is read. In the site, each such file becomes a page of its own, generated here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?:\.\./)+([\w./-]+)(#[^)]*)?\)")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cuh": "cuda", ".cu": "cuda", ".yaml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside docs/ that a document links to."""
    linked = set()
    for page in files.documentation_pages():
        text = page.content_string
        linked |= {match[1] for match in LINK.finditer(text) if is_outside(page.src_uri, match[0])}
    for name in sorted(linked):
        path = ROOT / name
        if path.is_file():
            files.append(File.generated(config, page_of(name), content=show(path, name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside docs/ into links to their pages."""
    up = "../" * page.file.src_uri.count("/")

    def turn(match: re.Match[str]) -> str:
        return f"]({up}{page_of(match[1])})" if is_outside(page.file.src_uri, match[0]) else match[0]

    return LINK.sub(turn, markdown)


def is_outside(source: str, link: str) -> bool:
    """Whether a link in the document `source`, relative to docs/, climbs out of docs/."""
    return link.count("../") > source.count("/")


def page_of(name: str) -> str:
    return name if name.endswith(".md") else f"source/{name}.md"


def show(path: Path, name: str) -> str:
    text = path.read_text(encoding="utf-8")
    if name.endswith(".md"):
        return text
    return f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
