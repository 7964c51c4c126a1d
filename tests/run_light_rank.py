"""A rank that needs no torch: it writes down that it started, and ends as FOLDER/codes says or on SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from megatron_vlm.runtime.exit_codes import FAILED, SAVED


def main(folder: Path) -> None:
    codes = json.loads((folder / "codes").read_text())
    starts = len((folder / "starts").read_text().splitlines()) if (folder / "starts").exists() else 0

    def stop(number: int, _: FrameType | None) -> None:
        (folder / "stop").touch()  # ranks agree to stop

    signal.signal(signal.SIGTERM, stop)
    with (folder / "starts").open("a") as file:
        file.write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n")
    if codes:
        sys.exit(codes[starts])
    while not (folder / "finish").exists():
        if (folder / "stop").exists():
            time.sleep(0.5)  # the other rank sees it, too
            (folder / "stop").unlink(missing_ok=True)
            sys.exit(SAVED)
        if (folder / "fail").exists():
            (folder / "fail").unlink()
            sys.exit(FAILED)
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
