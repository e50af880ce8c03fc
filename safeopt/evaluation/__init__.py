"""Refusal, over-refusal and task figures of a chat model, with transcripts."""

from safeopt.evaluation.anchored import refusal_judge
from safeopt.evaluation.generation import Decoding, evaluating, greedy_replies
from safeopt.evaluation.nll import reply_nll
from safeopt.evaluation.refusal import is_refusal
from safeopt.evaluation.suite import SuiteResult, Verdict, evaluate, judge, write_transcripts
from safeopt.intervals import Rate

__all__ = [
    "Decoding",
    "Rate",
    "SuiteResult",
    "Verdict",
    "evaluate",
    "evaluating",
    "greedy_replies",
    "is_refusal",
    "judge",
    "refusal_judge",
    "reply_nll",
    "write_transcripts",
]
