"""From files to batches: ingest, the store on disk, the plan of an epoch, and the loader."""
