"""What a caller may want to know about each token besides the loss, out of the same pass over the logits."""

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass
class TokenStats:
    """Pass one to an operator and read it afterwards. Every field is a detached fp32 tensor [tokens], or None.

    Filled always: `divergence`; `cross_entropy` where labels are given, at the label_temperature (0 where the label is -100);
    `clipped` where there is a clipping: 1 where that left a label's term no gradient, else 0.
    Filled with `detail=True`, at the divergence's temperature, in nats:

    * `forward_kl` KL(teacher‖student) and `reverse_kl` KL(student‖teacher), whatever kind is trained on; of the buckets
      for top-k.
    * `student_entropy`, `teacher_entropy`; for a top-k teacher the least that the entropy of its buckets can be, a lower bound.
    * `top1_agreement`: 1 where both sides have the same most probable token, else 0.
    * `teacher_prob_of_label`: where labels are given, 0 where the label is -100; for a top-k teacher 0 too where the
      label is not among its ids, a lower bound.
    * `student_mass_on_topk`: only for a top-k teacher, the student's probability of the teacher's ids.

    The detail costs elementwise work (about 1 ns per logit on two CPU cores), no matrix product.
    """

    detail: bool = False
    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None
    clipped: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None
    teacher_prob_of_label: Tensor | None = None
    student_mass_on_topk: Tensor | None = None

    def clear(self) -> None:
        for field in fields(self):
            if field.name != 'detail':
                setattr(self, field.name, None)
