package protocol

// Copy says that the client has copied the content of one object that it holds into another one that it holds.
type Copy struct {
	Source, Copy Object
}

// Locate asks where a piece of work would find what it needs.
type Locate struct {
	Role    string   // of the instances that could do it
	Hashes  []byte   // packed keys of the prompt's blocks, in order
	Objects []Object // sealed ones, or a token log
}

// Located answers Locate.
type Located struct {
	Blocks int // of the first hashes: cached anywhere on the node
	Sites  []Site
}

// Site is an NPU of an instance, by what lies in its memory domain. The caller's own are there in any case, others if there is
// something.
type Site struct {
	Instance string
	NPU      int
	Blocks   int   // of the first hashes
	Near     []int // of Objects, rising: those that lie there or have a copy there
}
