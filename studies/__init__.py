"""Studies made with selfdistill, a folder each; they come with the repository only."""
