"""What tree policies share."""


def check_positive(**settings: int | None) -> None:
    """Raise ValueError, naming the setting, if one of these is below 1; None is none."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"tree.{name}={value}: must be at least 1")
