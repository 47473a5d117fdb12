"""What a run found, how sure it is, and how it went: as a page and as pictures."""
