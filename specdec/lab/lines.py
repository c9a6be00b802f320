"""Lines for the user."""

from rich.console import Console


def tell(console: Console, text: str) -> None:
    """Print a line as it is: neither wrapped, nor coloured, nor read for marks."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
