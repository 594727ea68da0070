"""Models on the Hub: what a repository holds, fetching it file by file, and uploading to it."""
