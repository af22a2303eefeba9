"""What each part of `first_hour.py` runs, most telling first; `run` in the part's own file says what a case means.

A case has a name of its own in its part. `limit`: seconds after which it is given up, 120 by default; `env`: variables that its
process needs. Standard library only, for `first_hour.py` reads it where torch may be broken.
"""

import os

WIDTHS = (151_936, 151_665)  # of Qwen's heads: padded, and as its tokenizer has them, which is odd
DIVERGENCES = ('jsd', 'forward_kl', 'reverse_kl', 'jsd 0.2', 'skew_forward_kl', 'skew_reverse_kl', 'tvd')


def of(part: str, tiny: bool) -> list[dict]:
    return {'checks': checks, 'products': products, 'sweeps': sweeps, 'heads': heads, 'moving': moving, 'training': training}[part](tiny)


def checks(tiny: bool) -> list[dict]:
    variants = ('labels', 'soft cap', 'bias and LoRA', 'close', 'one head', 'offset', 'many chunks')[: 3 if tiny else None]
    return [
        dict(name='machine'),
        dict(name='jsd', kind='jsd'),
        *(dict(name=f'jsd, {variant}', kind='jsd', variant=variant) for variant in variants),
        *(
            dict(name=f'top-k, {variant}', topk=variant)
            for variant in ('bucket', 'renormalize', 'temperature', 'labels')[: 2 if tiny else None]
        ),
        *(dict(name=name) for name in ('cross-entropy', 'statistics', 'ready logits')),
        dict(name='extremes', limit=300),  # as many kernels as it has divergences
        *(dict(name=kind, kind=kind) for kind in ((*DIVERGENCES[1:], 'jsd 0.001', 'jsd 0.999'), ('tvd',))[tiny]),
        dict(name='more than 2^31 logits', limit=240),
        dict(name='the same twice'),
    ]


def products(tiny: bool) -> list[dict]:
    if tiny:
        return [dict(name='memory'), dict(name='64 x 32 x 300', tokens=64, hidden=32, columns=300, stride=320)]
    found = [dict(name='memory')]
    for hidden in (4096, 2048, 896):
        for columns in WIDTHS:
            for stride in sorted({-(-columns // 64) * 64, columns}, reverse=True):
                for tokens in (512, 1024, 2048, 4096, 8192):
                    name = f'{tokens} x {hidden} x {columns}' + (f' in rows of {stride}' if stride != columns else '')
                    found.append(dict(name=name, tokens=tokens, hidden=hidden, columns=columns, stride=stride))
    return found


def sweeps(tiny: bool) -> list[dict]:
    found = [dict(name='jsd', kind='jsd'), dict(name='all that runs', kind='jsd', profiled=True)]
    found += [dict(name=f'one load, {kind}', kind=kind, one_load=True) for kind in ('jsd', 'forward_kl')]
    found += [dict(name=f'jsd, {what}', kind='jsd', what=what) for what in ('labels', 'top-k', 'cross-entropy', 'statistics')]
    found += [dict(name='jsd, 151665', kind='jsd', vocab=151_665)]
    found += [dict(name=kind, kind=kind) for kind in (DIVERGENCES[1:], ('tvd',))[tiny]]
    return [{**case, 'env': {'TRITON_INTERPRET': '1'}} for case in found] if tiny else found


def heads(tiny: bool) -> list[dict]:
    shapes = [(tokens, hidden, vocab) for vocab in WIDTHS for hidden in (4096, 2048, 896) for tokens in (8192, 1024)]
    found = []
    for tokens, hidden, vocab in [(16, 32, 300)] if tiny else shapes:
        for objective in ('jsd', 'top-k', 'cross-entropy'):
            for head in ('frozen', 'trained'):
                name = f'{objective}, {head}, {tokens} x {hidden} x {vocab}'
                found.append(dict(name=name, objective=objective, head=head, tokens=tokens, hidden=hidden, vocab=vocab, limit=240))
    return found


def moving(tiny: bool) -> list[dict]:
    offload = [dict(name=f'teacher, {how}', how=how) for how in ('stays', 'layer', 'model')]
    env = {'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True'}
    expandable = [{**case, 'name': f'{case["name"]}, expandable segments', 'env': env} for case in offload]
    return [*offload, dict(name='pinned memory'), dict(name='moving average'), *expandable[: 1 if tiny else None]]


def training(tiny: bool) -> list[dict]:
    ways = ('full', 'lora', 'shared base', 'offloaded')
    found = [dict(name=f'{way}, {who}', way=way, who=who, limit=300) for way in ways for who in ('ours', 'ms-swift')]
    found += [dict(name='offloaded by layers, ours', way='offloaded by layers', who='ours', limit=300)]
    return found[:2] if tiny else found


def gpu() -> str:
    """The one that torch calls the first, as nvidia-smi knows it."""
    return os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')[0] or '0'
