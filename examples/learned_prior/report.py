"""What the rows say: tables in Markdown, and a picture."""
from pathlib import Path
def tables(rows): return ""
def picture(rows, path): pass
