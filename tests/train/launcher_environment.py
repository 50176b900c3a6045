"""What `accelerate launch` tells its first process. Argument: a JSON file, `{file to write: the launcher's arguments}`.

One start for all of them, because most of a start is imports; each is launched as from the command line.
"""

import json
import os
import sys
from pathlib import Path

if "RANK" not in os.environ:
    from accelerate.commands.launch import launch_command, launch_command_parser

    for out, arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        launch_command(launch_command_parser().parse_args([*arguments, __file__, out]))
elif os.environ["RANK"] == "0":
    said = {k: v for k, v in os.environ.items() if k.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))}
    Path(sys.argv[1]).write_text(json.dumps(said), encoding="utf-8")
