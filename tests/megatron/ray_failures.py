"""Runs of the real driver on the real Ray, with ranks that do nothing but fail, beside servers that do no more: ``python ray_failures.py
cases.json``.

The cases: ``{name: {"yaml": {...}, "ranks": [what each of them does], "without_plugin": whether the nodes have none, "options": whether the
file is only read}}``. The file becomes ``{name: {"error": [class, text], "pids": [...], "options": {"train": ..., group: ...}}}``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import ray
import yaml
from swift.ray.megatron.pipeline import MegatronRayPipeline

from swift_gkd_plugin import register
from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.megatron import ray_driver
from swift_gkd_plugin.megatron.ray_groups import split_options
from swift_gkd_plugin.teachers.server import TeacherServerError

register()
ray_driver.OTHERS_SECONDS = 2


class Rank:
    def run(self, enter, argv, directory, version, engines, teachers):
        rank = int(os.environ['RANK'])
        Path(directory, f'pid{rank}').write_text(str(os.getpid()))
        does = argv[argv.index('--ranks') + 1 :][rank]
        if does == 'refuses':
            raise OptionError('--lmbda 2: too much.')
        if does == 'raises':
            raise ValueError('something else')
        if does == 'asks':
            ray.wait(teachers)
            raise TeacherServerError('no connection')
        if does == 'dies':
            os._exit(9)
        time.sleep(600)


def with_fake_servers(pipeline):
    options, groups = split_options(pipeline)
    return options, [dataclasses.replace(group, command='fake_server') for group in groups]


def pids() -> list[int]:
    return [int(file.read_text()) for file in sorted(Path().glob('pid*'))]


ranks_of_the_plugin = ray_driver.Rank
ray_driver.split_options = with_fake_servers
path = Path(sys.argv[1])
found = {}
for name, case in json.loads(path.read_text()).items():
    for file in Path().glob('pid*'):
        file.unlink()
    groups = {'rlhf_type': 'gkd', 'model': 'student', 'nnodes': 2, 'train': {'gpus': 2, 'ranks': case.get('ranks')}}
    Path('ray.yaml').write_text(yaml.safe_dump(groups | case.get('yaml', {})))
    missing = Path(os.environ['WITHOUT_PLUGIN'])
    missing.touch() if case.get('without_plugin') else missing.unlink(missing_ok=True)
    ray_driver.Rank = ranks_of_the_plugin if case.get('without_plugin') else Rank
    error, options = None, None
    try:
        pipeline = MegatronRayPipeline('ray.yaml')
        if case.get('options'):
            train, engines = split_options(pipeline)
            options = {'train': train} | {group.name: dataclasses.asdict(group) for group in engines}
        else:
            pipeline.run()
    except Exception as raised:
        error = [type(raised).__name__, str(raised)]
    found[name] = {'error': error, 'pids': pids(), 'options': options}
path.write_text(json.dumps(found))
