package memtest

// NoLeaksWithin is NoLeaks with another patience.
var NoLeaksWithin = noLeaks
