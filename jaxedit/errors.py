"""The errors jaxedit raises on bad input."""


class JaxEditError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do about it."""


class CheckpointError(JaxEditError):
    """A checkpoint that cannot be loaded exactly: unknown field, missing, extra or misshapen tensor."""


class RequestError(JaxEditError):
    """Edit requests that cannot be carried out: `problems` lists every one of them."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{head} in the edit requests:\n" + "\n".join(f"  - {p}" for p in problems))


class StatisticsError(JaxEditError):
    """Key second moments that do not fit the model or are not usable."""


class PatchError(JaxEditError):
    """A patch that does not fit the model it is applied to or withdrawn from."""
