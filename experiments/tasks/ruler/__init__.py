"""RULER (Hsieh et al., arXiv 2404.06654): 13 sub-tasks of four kinds, at any length in tokens.

`task.py` has the task, and each other file a kind of sub-task: what is hidden (`needles.py`, `variables.py`),
counted (`words.py`) and read (`documents.py`), of what `material.py` makes.

As published are the kinds of needles and haystacks, how many there are and how often words come, the limits
of replies, and the metric. Differences: the wording; keys and the words of lists are pairs of an adjective
and a noun from lists of ours, noise is a passage of ours, and the essay is a novel where no other text is
given; a prompt is filled to the last word, sentence or document that has room; questions are drawn from the
whole file by the seed.
"""

from retro_jax.experiments.tasks.ruler.task import RULER, SUBTASKS

__all__ = ["RULER", "SUBTASKS"]
