"""How fast the samplers and judges are, as ratios that are measured in one process (`tsdfm-bench bench-speed`).

Seconds depend on the machine; ratios hardly do. Whatever is divided is measured alternately, once each per repeat, and
the median of the repeats' own ratios is reported with their range.

    overhead     seconds of a sampling run / seconds of its network calls alone, made again on the same inputs
    ratio_plain  seconds of a plain loop (`plain`) / seconds of the run, at the same law: full-vocabulary softmax and a
                 draw in fp64 at every position and step, with the same network
"""
