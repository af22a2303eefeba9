"""`swift rlhf` where the plugin lies on the path and is not installed, so that no start-up hook finds it."""

import os

if __name__ == '__main__':
    if os.environ.get('SWIFT_GKD_PLUGIN') != '0':
        import swift_gkd_plugin

        swift_gkd_plugin.register()
    from swift.cli.utils import try_use_single_device_mode
    from swift.pipelines import rlhf_main

    try_use_single_device_mode()
    rlhf_main()
