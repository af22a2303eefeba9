"""One rank of a sharded vocabulary: compares its share with the unsharded operator. Started by
test_divergence_sharded.py."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from divergence_reference import relative, sure_of_its_labels

from swift_gkd_plugin.divergence import (
    Clipping,
    Divergence,
    LogitTransform,
    Reference,
    TokenStats,
    chunks,
    implementations,
    linear_divergence,
    topk_divergence,
)
from swift_gkd_plugin.divergence._eager import Eager

RANK, WORLD = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
TOKENS, DIM, OTHER = 21, 16, 12


def cut(total, uneven):
    """Widths of the shards: as even as they can be, or visibly not."""
    widths = [total // WORLD + (r < total % WORLD) for r in range(WORLD)]
    if uneven:
        widths[0], widths[-1] = widths[0] + 7, widths[-1] - 7
    return widths


def shard(x, widths):
    first = sum(widths[:RANK])
    return x[first : first + widths[RANK]]


def close(found, expected, what):
    error = relative(found, expected)
    assert error < 1e-6, f'rank {RANK}: {what} is off by {error}'


def extrapolated(hidden, weight, bias, by, sharded):
    """A reference whose head is split at other ids than the two beside it."""
    if by is None:
        return None
    widths = cut(len(weight), True)
    return Reference(hidden, shard(weight, widths), by, shard(bias, widths)) if sharded else Reference(hidden, weight, by, bias)


def compare(divergence, student_vocab, teacher_vocab, uneven, detail, tokens=TOKENS, chunk=8, vocab_size=None, extrapolation=None):
    torch.manual_seed(0)
    x = {
        'hidden': torch.randn(tokens, DIM),
        'weight': torch.randn(student_vocab, DIM) * 0.5,
        'bias': torch.randn(student_vocab),
        'a': torch.randn(3, DIM),
        'b': torch.randn(student_vocab, 3) * 0.1,
    }
    other, head, head_bias, head_a, head_b = (
        torch.randn(tokens, OTHER),
        torch.randn(teacher_vocab, OTHER) * 0.5,
        torch.randn(teacher_vocab),
        torch.randn(3, OTHER),
        torch.randn(teacher_vocab, 3) * 0.1,
    )
    reference = torch.randn(tokens, OTHER), torch.randn(student_vocab + 13, OTHER) * 0.5, torch.randn(student_vocab + 13)
    labels = torch.randint(-1, min(student_vocab, teacher_vocab), (tokens,))
    common = dict(
        token_weights=torch.rand(tokens),
        labels=labels,
        label_weights=torch.randn(tokens),
        label_temperature=0.1 * 40 ** torch.rand(tokens) if uneven else 0.9,
        clipping=Clipping(-6 + 2 * torch.randn(tokens), 0.2, 0.28) if uneven else None,
        chunk_tokens=chunk,
        vocab_size=vocab_size,
        student_transform=LogitTransform(softcap=20.0),
    )
    student_cut, teacher_cut = cut(student_vocab, uneven), cut(teacher_vocab, False)
    local = {n: shard(t, student_cut) if n in ('weight', 'bias', 'b') else t for n, t in x.items()}
    found, expected = [], []
    for out, tensors, teacher, group in (
        (expected, x, (head, head_bias, head_b), None),
        (found, local, [shard(t, teacher_cut) for t in (head, head_bias, head_b)], dist.group.WORLD),
    ):
        tensors = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        for reduction in ('sum', 'none'):
            stats = TokenStats(detail=detail)
            loss = linear_divergence(
                tensors['hidden'],
                tensors['weight'],
                other,
                teacher[0],
                divergence,
                reduction=reduction,
                student_bias=tensors['bias'],
                teacher_bias=teacher[1],
                vocab_group=group,
                stats=stats,
                student_lora=(tensors['a'], tensors['b'], 0.5),
                teacher_lora=(head_a, teacher[2], 2.0),
                reference=extrapolated(*reference, extrapolation, group),
                **common,
            )
            out.append((loss, torch.autograd.grad(loss.sum(), list(tensors.values())), stats))
        values, ids = torch.log_softmax(other @ head.t(), -1).topk(9)
        loss = topk_divergence(
            tensors['hidden'],
            tensors['weight'],
            values,
            ids,
            divergence,
            reduction='sum',
            vocab_group=group,
            topk_temperature=1.0,
            student_bias=tensors['bias'],
            student_lora=(tensors['a'], tensors['b'], 0.5),
            stats=(stats := TokenStats(detail=detail)),
            **common,
        )
        out.append((loss, torch.autograd.grad(loss, list(tensors.values())), stats))
        loss = linear_divergence(
            tensors['hidden'],
            tensors['weight'],
            None,
            None,
            divergence,
            reduction='sum',
            vocab_group=group,
            teacher_logprobs=torch.linspace(-9, -1, tokens),
            student_bias=tensors['bias'],
            student_lora=(tensors['a'], tensors['b'], 0.5),
            stats=(stats := TokenStats(detail=detail)),
            **common,
        )
        out.append((loss, torch.autograd.grad(loss, list(tensors.values())), stats))
    for (loss, gradients, stats), (right, right_gradients, right_stats) in zip(found, expected, strict=True):
        close(loss, right, 'loss')
        for name, one, whole in zip(x, gradients, right_gradients, strict=True):
            close(
                one,
                shard(whole, student_cut) if name in ('weight', 'bias', 'b') else whole,
                f'{divergence.kind} gradient of {name}',
            )
        for name, value in vars(right_stats).items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(getattr(stats, name), value, atol=2e-6), name


def main():
    dist.init_process_group('gloo', init_method=sys.argv[1], rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    for divergence in (Divergence(temperature=0.9), Divergence('forward_kl'), Divergence(beta=0.2)):
        compare(divergence, 152, 160, uneven=False, detail=divergence.kind == 'jsd')
    for kind in ('reverse_kl', 'skew_forward_kl', 'skew_reverse_kl', 'tvd'):
        compare(Divergence(kind), 170, 150, uneven=True, detail=False)
    compare(Divergence(beta=0.3), 152, 160, uneven=False, detail=True, extrapolation=1.5)
    compare(Divergence('reverse_kl'), 170, 150, uneven=True, detail=False, extrapolation=0.4)
    identical_models()
    certain_tokens()
    shards_that_change()
    kernels_of_some_ranks()
    chunks_chosen_by_default()
    dist.barrier()
    # Every check has passed. gloo's threads may still talk to a peer that is gone already, and end a process that waits for them.
    os._exit(0)


def identical_models():
    """D11: the teacher's head is the student's with padding rows. Aligning local shards pairs other
    tokens."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(TOKENS, DIM), torch.randn(152, DIM)
    padded = torch.cat([weight, torch.randn(8, DIM)])
    found = linear_divergence(
        hidden,
        shard(weight, cut(152, False)),
        hidden,
        shard(padded, cut(160, False)),
        Divergence('forward_kl'),
        vocab_group=dist.group.WORLD,
    )
    assert found.max() < 1e-10, f'identical models are {float(found.max())} apart'
    weight = shard(weight, cut(152, False))
    reference = Reference(hidden, weight, 1.5)
    found = linear_divergence(hidden, weight, hidden, weight, Divergence(), reference=reference, vocab_group=dist.group.WORLD)
    assert not found.any(), f'identical models are {float(found.max())} apart'


def certain_tokens():
    """Their cross-entropy, at a temperature that no binary number is."""
    hidden, weight, labels = sure_of_its_labels(160)
    divergence, group = Divergence(temperature=0.7), dist.group.WORLD
    topk = torch.log_softmax(hidden @ weight.t() / 0.7, -1).topk(3)
    weight = shard(weight, cut(160, False))
    for call in (
        lambda **more: linear_divergence(hidden, weight, hidden, weight, divergence, **more),
        lambda **more: topk_divergence(hidden, weight, *topk, divergence, **more),
    ):
        call(labels=labels, vocab_group=group, stats=(stats := TokenStats()))
        assert stats.cross_entropy.abs().max() < 1e-6, stats.cross_entropy


def shards_that_change():
    """Calls of which one rank's rows are as many as before, and another's are not."""
    torch.manual_seed(2)
    hidden, weight, labels = torch.randn(TOKENS, DIM), torch.randn(300, DIM), torch.arange(TOKENS)
    for last in (30, 40, 30):
        widths = [30] * (WORLD - 1) + [last]
        whole = weight[: sum(widths)]
        found, right = (
            linear_divergence(hidden, head, None, None, Divergence(), labels=labels, vocab_group=group)
            for head, group in ((shard(whole, widths), dist.group.WORLD), (whole, None))
        )
        close(found, right, f'loss of shards {widths}')


def kernels_of_some_ranks():
    """What does not work on one rank is used by none; each rank tries it alone."""
    if not implementations._HAS_TRITON:
        return
    from swift_gkd_plugin.divergence import _trial, _triton

    device, of_all, of_some = torch.device('cpu'), Divergence(), Divergence('tvd')
    if RANK == 0:
        assert _trial.wrong(Eager, of_all, device) is None
    _triton.works = lambda device, divergence, label_temperatures: divergence == of_all or RANK == 0
    for divergence in (of_all, of_some, of_all):
        sweeps = implementations._on_gpu(device, dist.group.WORLD, divergence, False)
        assert sweeps is (_triton.Triton if divergence == of_all else Eager), (RANK, divergence, sweeps)


def chunks_chosen_by_default():
    """Several chunks of a size that the operator chooses, where the common vocabulary cuts the last shard: its rank has fewer columns
    than the others, and has to choose what they choose."""
    choose, chosen = chunks.chunk_tokens, []

    def on_every_rank(*args):
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, choose(*args))
        assert len(set(everyone)) == 1, f'the ranks choose chunks of {everyone} tokens'
        chosen.append(everyone[0])
        return everyone[0]

    bytes_before = chunks._CHUNK_BYTES['cpu']
    chunks.chunk_tokens = lambda *args: on_every_rank(*args) if args[-1] else choose(*args)  # the last: in a group
    generator = torch.Generator().manual_seed(2)
    for divergence, uneven in ((Divergence(temperature=0.9), True), (Divergence('forward_kl'), False)):
        chunks._CHUNK_BYTES['cpu'] = 830_000 // WORLD
        compare(divergence, 200, 210, uneven, detail=uneven, tokens=400, chunk=None, vocab_size=200 - 40 // (WORLD - 1))
    assert max(chosen) < 400
    for _ in range(8):
        budget, tokens, cut_off = (int(torch.randint(*span, (), generator=generator)) for span in ((10**5, 3 * 10**6), (65, 600), (0, 30)))
        chunks._CHUNK_BYTES['cpu'] = budget // WORLD
        compare(Divergence(), 200, 200, True, False, tokens, None, 200 - cut_off)
    assert len(set(chosen)) > 3
    chunks.chunk_tokens, chunks._CHUNK_BYTES['cpu'] = choose, bytes_before


main()
