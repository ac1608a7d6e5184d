"""The ground floor: trains anything that keeps its contracts; knows no file format and no model."""
