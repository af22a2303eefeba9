"""The first moments of a Python process: what the .pth does there, and that nothing of it fails in silence."""

from __future__ import annotations

import sys
from pathlib import Path

import helpers
import pytest
from sites import ROOT, make_site

from swift_gkd_plugin import activation

HOST = """
import sys
if __name__ == '__main__':
    import swift
    print('stock ms-swift', swift.version.__version__)
"""


def host_script(directory: Path, version: str = '4.6.0', back_end: str = '') -> Path:
    """A ms-swift that consists of its version and its rlhf script."""
    package = directory / 'swift'
    script = package / 'cli' / back_end / 'rlhf.py'
    script.parent.mkdir(parents=True)
    (package / '__init__.py').write_text('from . import version\n')
    (package / 'version.py').write_text(f'__version__ = {version!r}\n')
    script.write_text(HOST)
    return script


def start(python: Path, *argv: object, host: Path, **env: str) -> tuple[int, str]:
    return helpers.run([python, *argv], env={'PYTHONPATH': str(host), **env})


def test_unrelated_python_imports_nothing_of_ours():
    code = 'import sys; print([m for m in sys.modules if m.startswith(("swift", "torch"))], sys.excepthook is sys.__excepthook__)'
    assert helpers.run([sys.executable, '-c', code]) == (0, '[] True\n')


@pytest.mark.parametrize('line', ['--rlhf_type dpo', '', '--rlhf_types gkd', '--note gkd'])
def test_other_commands_run_without_us(tmp_path, line):
    script = host_script(tmp_path, version='3.9.0')
    assert start(sys.executable, script, *line.split(), host=tmp_path) == (0, 'stock ms-swift 3.9.0\n')


@pytest.mark.parametrize('version', ['3.12.6', '4.5.9', '4.6.0.dev0', '4.7.0.dev0', '4.7.0'])
@pytest.mark.parametrize('line', ['--rlhf_type gkd', '--rlhf_type=gkd', '--rlhf-type gkd', '--rlhf gkd', '--rlhf_type dpo --rlhf_type gkd'])
def test_unknown_host_is_refused_in_one_line(tmp_path, version, line):
    script = host_script(tmp_path, version)
    returncode, output = start(sys.executable, script, *line.split(), host=tmp_path)
    assert returncode == 1
    assert output.startswith(f'swift-gkd-plugin: ms-swift {version}: swift-gkd-plugin ')
    assert 'supports ms-swift>=4.6.0,<4.7' in output and output.count('\n') == 1
    for off in ('0', 'false'):
        assert start(sys.executable, script, *line.split(), host=tmp_path, SWIFT_GKD_PLUGIN=off)[1] == f'stock ms-swift {version}\n'


@pytest.mark.parametrize('version', ['4.6.0', '4.6.1', '4.6.10.post1'])
def test_known_host_is_accepted(tmp_path, version):
    script = host_script(tmp_path, version)
    assert start(sys.executable, script, '--rlhf_type', 'gkd', host=tmp_path) == (0, f'stock ms-swift {version}\n')


def test_register_refuses_unknown_host_and_obeys_the_switch(tmp_path):
    host_script(tmp_path, version='4.7.0')
    code = 'from swift_gkd_plugin import register; register(); print("went on")'
    returncode, output = start(sys.executable, '-c', code, host=tmp_path)
    assert returncode == 1 and 'HostError: ms-swift 4.7.0: swift-gkd-plugin' in output.splitlines()[-1]
    returncode, output = start(sys.executable, '-c', code, host=tmp_path, SWIFT_GKD_PLUGIN='0')
    assert returncode == 0 and 'SWIFT_GKD_PLUGIN=0: --rlhf_type gkd stays the one of ms-swift.' in output and 'went on' in output


def test_launchers_and_debuggers_before_the_script(tmp_path):
    script = host_script(tmp_path, version='3.9.0')
    for before in (['-u'], ['-X', 'utf8', '-W', 'ignore'], ['-m', 'cProfile', '-o', tmp_path / 'profile']):
        returncode, output = start(sys.executable, *before, script, '--rlhf_type', 'gkd', host=tmp_path)
        assert returncode == 1 and 'supports ms-swift' in output
    returncode, output = start(sys.executable, '-m', 'swift.cli.rlhf', '--rlhf_type', 'gkd', host=tmp_path)
    assert returncode == 1 and 'supports ms-swift' in output


def test_ray_reads_a_file_and_nothing_else(tmp_path):
    script = host_script(tmp_path, back_end='_megatron')
    config = tmp_path / 'ray.yaml'
    config.write_text("train:\n  gpus: 2\nrlhf_type: 'gkd'\n")
    assert start(sys.executable, script, '--use_ray', 'true', '--rlhf_type', 'gkd', '--config', config, host=tmp_path)[0] == 0
    for line, what in (
        (['--rlhf_type', 'gkd', '--use_ray'], '--rlhf_type is not read'),
        (['--use_ray', 'true', '--lr=1', '--config', config], '--lr is not read'),
        (['--use_ray', '--rlhf_type=gkd', '--config', '/no/file'], '--rlhf_type is not read'),
    ):
        returncode, output = start(sys.executable, script, *line, host=tmp_path)
        assert returncode == 1
        assert output.startswith(f'swift-gkd-plugin: megatron rlhf --use_ray: {what}')
        assert 'SWIFT_GKD_PLUGIN=0' in output and output.count('\n') == 1
        assert start(sys.executable, script, *line, host=tmp_path, SWIFT_GKD_PLUGIN='0')[0] == 0
    pipeline = tmp_path / 'swift' / 'ray' / 'megatron' / 'pipeline.py'
    pipeline.parent.mkdir(parents=True)
    pipeline.write_text("print('stock pipeline')\n")
    by_module = [sys.executable, '-u', '-m', 'swift.ray.megatron.pipeline', '--config', config]
    assert start(*by_module, host=tmp_path) == (0, 'stock ms-swift 4.6.0\n')  # by the command, where it can be taken over
    assert start(*by_module, '--lr', '1', host=tmp_path)[1].startswith('swift-gkd-plugin: megatron rlhf --use_ray: --lr is not read')
    assert start(*by_module, host=tmp_path, SWIFT_GKD_PLUGIN='0') == (0, 'stock pipeline\n')
    config.write_text('rlhf_type: grpo\n')
    assert start(*by_module, host=tmp_path) == (0, 'stock pipeline\n')
    for line in (['--use_ray', '--config', config], ['--rlhf_type', 'gkd', '--use_ray', 'false'], ['--use_ray', '--config', '/no/file']):
        assert start(sys.executable, script, *line, host=tmp_path)[0] == 0


def test_broken_installation_stops_gkd_and_nothing_else(tmp_path):
    """The .pth of an editable install whose checkout is gone."""
    python = make_site(tmp_path / 'site', pth=True)
    script = host_script(tmp_path / 'host')
    returncode, output = start(python, script, '--rlhf_type', 'gkd', host=tmp_path / 'host')
    assert returncode == 1
    assert output.startswith("swift-gkd-plugin: broken installation, No module named 'swift_gkd_plugin'. SWIFT_GKD_PLUGIN=0")
    for argv in ([script, '--rlhf_type', 'dpo'], ['-c', 'import swift; print("stock ms-swift", swift.version.__version__)']):
        assert start(python, *argv, host=tmp_path / 'host') == (0, 'stock ms-swift 4.6.0\n')
    stock = start(python, script, '--rlhf_type', 'gkd', host=tmp_path / 'host', SWIFT_GKD_PLUGIN='0')
    assert stock == (0, 'stock ms-swift 4.6.0\n')


def test_error_in_a_seam_stops_gkd(tmp_path):
    """A host that says 4.6.0 but lacks what we change."""
    script = host_script(tmp_path)
    arguments = tmp_path / 'swift' / 'arguments'
    arguments.mkdir()
    (arguments / '__init__.py').write_text('')
    (arguments / 'rlhf_args.py').write_text('')
    script.write_text('import swift.arguments.rlhf_args\nprint("stock ms-swift")\n')
    returncode, output = start(sys.executable, script, '--rlhf_type', 'gkd', host=tmp_path)
    assert returncode == 1 and "has no attribute 'RLHFArguments'" in output and 'stock ms-swift' not in output


def test_editable_install_is_a_plain_path_line():
    """setuptools' import finder for editable installs would cost every Python of the environment about 9 ms."""
    code = 'import sys; print([f for f in sys.meta_path if "editable" in repr(f)])'
    assert helpers.run([sys.executable, '-c', code]) == (0, '[]\n')


def test_supported_hosts_are_those_that_pip_installs():
    assert f'"ms-swift{activation.HOSTS}"' in (ROOT / 'pyproject.toml').read_text()
