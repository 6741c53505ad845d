"""Figures in files, drawn by matplotlib where --plot asks for one."""
import contextlib

from configurator import ConfigError


@contextlib.contextmanager
def drawing(path, columns=1, size=(7, 4.5), top=1.0, **shared):
    """Axes to draw on (`columns` > 1: an array of them); at the end the figure is laid out and written.

    size: inches; top: share of the height that the axes may take, what is above is left to a legend;
    shared: more for pyplot.subplots, such as sharey.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, columns, figsize=size, **shared)
    yield axes
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot():
    """matplotlib's, drawing into files."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error
    return plt
