"""Converting files: import and export, from preflight to publication."""
