"""The command line as one of several processes: ARGUMENTS… coordinator processes process_id."""

import sys

from jaxedit.cli import main

if __name__ == "__main__":
    *arguments, coordinator, processes, process_id = sys.argv[1:]
    sys.argv[1:] = [*arguments, "--coordinator", coordinator, "--processes", processes, "--process-id", process_id]
    main()
