"""Numbers of the paper, each with where it was taken from. What could not be had is not quoted."""

NOT_QUOTED = "not quoted"
A_PICTURE = "not quoted (a picture)"
MEMORY = "quoted from memory, not checked against the PDF"

#: Table 2: test errors in %, by data set and c (None: vanilla), from memory.
TABLE_2: dict[str, dict[float | None, float]] = {
    "mnist": {None: 0.38, 0.9: 0.40, 0.8: 0.42, 0.7: 0.40, 0.6: 0.42, 0.5: 0.86},
    "cifar10": {None: 6.69, 0.9: 6.78, 0.8: 6.86, 0.7: 6.93, 0.6: 7.72, 0.5: 8.71},
    "cifar100": {None: 23.97, 0.9: 24.58, 0.8: 24.99, 0.7: 25.99, 0.6: 27.30, 0.5: 29.45},
}

#: Table 4: bits/dim of the i-ResNet, as public leaderboards list them.
TABLE_4 = {"mnist": 1.06, "cifar10": 3.45}

#: Table 1, from memory: "yes", "no", or "–" where the property does not apply.
PROPERTIES = (
    "free-form Jacobian",
    "analytic forward",
    "analytic inverse",
    "non-volume-preserving",
    "exact likelihood",
    "unbiased log-det estimator",
)
TABLE_1 = {
    "ResNet": ("yes", "yes", "–", "–", "–", "–"),
    "NICE, i-RevNet": ("no", "yes", "yes", "no", "yes", "–"),
    "Real NVP": ("no", "yes", "yes", "yes", "yes", "–"),
    "Glow": ("no", "yes", "yes", "yes", "yes", "–"),
    "FFJORD": ("yes", "no", "no", "yes", "no", "yes"),
    "i-ResNet": ("yes", "yes", "no", "yes", "no", "no"),
}
