"""What pages are chosen by: a file for each kind of statistic, with the score that reads it.

Another one is a file like these and its name in the line below; from outside it is the same two calls.
"""

from pallas_kernels.metadata import mean_key, min_max
from pallas_kernels.scores import register_score
from pallas_kernels.statistics import register_statistic

for _kind in (min_max, mean_key):
    for _statistic in _kind.STATISTICS:
        register_statistic(_statistic)
    register_score(_kind.SCORE)
