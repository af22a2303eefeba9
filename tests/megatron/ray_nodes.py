"""Two nodes of Ray on the loopback, until standard input ends: prints the cluster's address.

A GPU is a number to Ray: there need be none.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

NODE = {'num_gpus': 2, 'num_cpus': 4, 'object_store_memory': 100 << 20, 'node_ip_address': '127.0.0.1'}

cluster = Cluster(initialize_head=True, head_node_args={**NODE, 'include_dashboard': False})
try:
    cluster.add_node(**NODE)
    print(cluster.address, flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
