package protocol

// Copy says that the client has copied the content of one object that it holds into another one that it holds.
type Copy struct {
	Source, Copy Object
}
