"""The process of a part: its cases, one after another, reported to `first_hour.py` as they go.

A case that raises is reported and the next one begins, unless the error has taken the GPU's context with it: then the process
ends, and `first_hour.py` starts another one for the rest.
"""

import argparse
import gc
import importlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'divergence')]
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('part')
    parser.add_argument('--device', required=True)
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--scratch', type=Path, required=True, help='a directory that goes away with the run')
    parser.add_argument('--report', type=int, required=True, help='file descriptor')
    args = parser.parse_args()
    cases = json.loads(sys.stdin.read())
    logging.basicConfig(level=logging.WARNING)

    with os.fdopen(args.report, 'w') as report:

        def say(**message) -> None:
            report.write(json.dumps(message) + '\n')
            report.flush()

        from meter import Meter

        meter = Meter(args.device, args.tiny, args.scratch)
        part = importlib.import_module(args.part)
        for number, case in enumerate(cases):
            say(start=number)
            print(f'---- {case["name"]}', flush=True)
            lost = False
            try:
                meter.fresh()
                for row in part.run(case, meter):
                    say(row={'status': 'ok', **row})
                meter.wait()
                say(row={'status': 'ok', 'end': True})
            except Exception as error:
                traceback.print_exc()
                say(row=meter.failure(error))
                lost = not meter.alive()
            gc.collect()
            say(end=number)
            if lost:
                sys.stdout.flush()
                os._exit(3)  # not through destructors, which would use the context


if __name__ == '__main__':
    main()
