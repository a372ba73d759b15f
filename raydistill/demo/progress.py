"""What a person sees while a world is built: one line per stage and a bar with the time left.

Without a console everything is silent. On a console that is no terminal (a log file) a line per tenth of the
steps replaces the bar.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raydistill.progress import say

StepProgress = Callable[[int, float], None]  # (steps done, loss of the last one)


def announce(console: Console | None, line: str) -> None:
    if console is not None:
        say(console, line)


@contextmanager
def training_progress(
    console: Console | None, num_steps: int, callback: StepProgress | None = None
) -> Iterator[StepProgress]:
    """Gives the function to call after each step; it draws on the console, then calls `callback`."""

    def both(draw: StepProgress) -> StepProgress:
        def after_step(step: int, loss: float) -> None:
            draw(step, loss)
            if callback is not None:
                callback(step, loss)

        return after_step

    if console is None:
        yield both(lambda step, loss: None)
    elif not console.is_terminal:
        yield both(_tenths(console, num_steps))
    else:
        bar = Progress(
            TextColumn("Training the teacher"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]:.3f} nats"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        with bar:
            task = bar.add_task("train", total=num_steps, loss=float("nan"))
            yield both(lambda step, loss: bar.update(task, completed=step, loss=loss))


def _tenths(console: Console, num_steps: int) -> StepProgress:
    every = max(1, num_steps // 10)

    def line(step: int, loss: float) -> None:
        if step % every == 0 or step == num_steps:
            announce(console, f"Training the teacher: step {step}/{num_steps}, loss {loss:.3f} nats")

    return line
