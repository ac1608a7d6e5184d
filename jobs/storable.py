"""A table of cells or genes as every version of anndata writes and reads it."""

import pandas as pd

from scarcade.dataloaders.schema import text_of


def storable(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in which text with gaps is categories, which can be stored, and pandas' own text is plain text."""
    frame = frame.copy()
    for name in frame.select_dtypes(include=[object, "string"]).columns:
        if frame[name].isna().any():
            frame[name] = pd.Categorical(text_of(frame[name]))
        elif isinstance(frame[name].dtype, pd.StringDtype):
            frame[name] = frame[name].astype(object)
    return frame
