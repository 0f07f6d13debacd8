"""What a machine has for each half of Decant, what it lacks, and the command that brings it: `decant doctor`.

`facts` collects: packages by their metadata, and heavy ones by an import in a child process (`probes`), so that a
broken installation cannot end the doctor. `diagnosis` says from the facts alone what can run.
"""
