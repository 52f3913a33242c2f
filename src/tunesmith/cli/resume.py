"""`tunesmith resume`: continue a run from its newest checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]...", help="Changes under device, log or checkpoint."
        ),
    ] = None,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="Go on although the rows have changed.")
    ] = False,
) -> int | None:
    """Go on with a run from its newest good checkpoint."""
    from tunesmith.distributed.env import is_main_process
    from tunesmith.distributed.spawn import start
    from tunesmith.run import ranks_of
    from tunesmith.run import resume as go_on

    count = ranks_of(run, overrides or ())
    if count > 1:
        return start(count, ["resume", run, *(overrides or ())])
    finished = go_on(run, overrides=overrides or (), changed_data=changed_data)
    if is_main_process():
        print(finished.model_folder)
    return None
