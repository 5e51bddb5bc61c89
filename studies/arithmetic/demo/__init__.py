"""`selfdistill demo`: run.py works through its stages, files.py reads them, page.py shows them."""
