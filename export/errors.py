"""The error of this room."""


class ExportError(RuntimeError):
    """A model cannot be exported, or a file cannot be read. The message says why and what to do, in one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of the message of the error's first cause, shortened so that it can stand within a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
