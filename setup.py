"""All metadata is in pyproject.toml. Here is only what it can't say: swift_gkd_plugin.pth belongs beside the package, in site-packages."""

import os

from setuptools import Command, setup
from setuptools.command.build import build

PTH = 'swift_gkd_plugin.pth'


class build_pth(Command):
    """Python reads .pth files in site-packages only, so PTH must lie at the top of a wheel, of an editable one too."""

    user_options = ()

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options('build', ('build_lib', 'build_lib'))

    def run(self) -> None:
        # An editable wheel takes nothing from build_lib; the install command's target is its top.
        target = self.get_finalized_command('install').install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        self.copy_file(PTH, os.path.join(target, PTH))

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [os.path.join(self.build_lib, PTH)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [PTH]


class build_with_pth(build):
    sub_commands = [*build.sub_commands, ('build_pth', None)]


setup(cmdclass={'build': build_with_pth, 'build_pth': build_pth})
