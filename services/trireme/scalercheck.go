package main

import (
	"encoding/json"
	"fmt"
)

// scalerCheckCmd says what a policy file means, or what is wrong with it.
type scalerCheckCmd struct {
	File string `arg:"" help:"Policy file, as scaler.yaml." type:"path"`
	JSON bool   `name:"json" help:"Write the policy as one JSON object."`
}

// Help is shown by `trireme scaler check --help`.
func (scalerCheckCmd) Help() string {
	return `Says in words what a policy of the scaler means, what the file leaves out included. One that cannot be used is an error that names the key
and its line, with exit status 2.

Examples:
  trireme scaler check scaler.yaml
  trireme scaler check /dev/null                      the policy of an empty file
  trireme scaler check scaler.yaml --json | jq .Bounds`
}

// Run checks and prints.
func (c *scalerCheckCmd) Run(e *env) error {
	p, err := readPolicy(c.File)
	if err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(e.out).Encode(p)
	}
	_, err = fmt.Fprint(e.out, p.Describe())
	return err
}
