"""How far apart a student's and a teacher's next-token distributions are, from hidden states and output heads."""

from .heads import LogitTransform, linear_logits
from .kinds import Divergence
from .operator import linear_divergence, logits_divergence, topk_divergence
from .stats import TokenStats

__all__ = ['Divergence', 'LogitTransform', 'TokenStats', 'linear_divergence', 'linear_logits', 'logits_divergence', 'topk_divergence']
