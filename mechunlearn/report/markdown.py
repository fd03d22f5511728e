"""Tables in Markdown, for pages and model cards."""

Table = list[list[str]]
"""Rows of texts, the first one the heading."""


def markdown_table(table: Table) -> str:
    """A table, a line a row."""
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
