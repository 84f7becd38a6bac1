"""The stages by the names that the command line has for them."""

from extras.corpus import chats, clean, dedup, perplexity, wiki, windows
from extras.corpus.pipeline import Stage

STAGES = {
    "wiki": Stage("wiki", wiki.wiki, wiki.WikiConfig()),
    "clean": Stage("clean", clean.clean, clean.CleanConfig()),
    "dedup": Stage("dedup", dedup.drop, dedup.DedupConfig(), "in order", dedup.sign_docs),
    "filter": Stage("filter", perplexity.filter, perplexity.FilterConfig(), "here"),
    "window": Stage("window", windows.window, windows.WindowConfig()),
    "concat": Stage("concat", windows.concat, windows.ConcatConfig(), "in order"),
    "sft": Stage("sft", chats.chats, chats.ChatsConfig()),
}
OF_ITEMS = ("sft", "wiki")  # these know their fields: they get an item's JSON, not the text in it
