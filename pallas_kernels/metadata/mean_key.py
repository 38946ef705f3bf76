"""The mean of a page's keys, in their dtype or in 8 bits, and its logit."""

from pallas_kernels.scores import PageScore
from pallas_kernels.statistics import MEAN, PageStatistic, PageVector

STATISTICS = (
    PageStatistic("mean_key", (PageVector(MEAN),)),
    PageStatistic("mean_key_int8", (PageVector(MEAN),), quantized=True),
)
SCORE = PageScore("mean_key", ("mean_key", "mean_key_int8"), lambda q: [q])
