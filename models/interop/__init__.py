"""Reading and writing the formats of scvi-tools and scArches."""
