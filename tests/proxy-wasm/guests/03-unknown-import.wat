(import "env" "proxy_does_not_exist" (func (param i32) (result i32)))
